"""What is measured of engines and pictures: latency per step count, peers, GPUs, storms."""
