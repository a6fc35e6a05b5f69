"""The service proxy `pyproxy`."""
