"""Many servers behind one address, on Ray Serve."""
