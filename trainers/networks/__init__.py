"""Networks that train or judge: students made of teachers, smaller networks, critics, rewards."""
