"""What all rooms stand on: files, errors, devices, processes, signals."""
