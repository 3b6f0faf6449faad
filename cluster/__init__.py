"""Putting the rooms together: Ray Serve workers, router, gateway, and the local stack."""
