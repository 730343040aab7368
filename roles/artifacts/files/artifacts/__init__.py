"""What the platform takes from outside: listed, downloaded into a mirror, verified, bundled for a closed network."""
