// Runs before the page is drawn: a theme chosen earlier must not flash. Without one the system's preference holds.
try { document.documentElement.dataset.theme = localStorage.getItem("fewstep.theme") ?? ""; } catch { /* no storage: as the system says */ }
