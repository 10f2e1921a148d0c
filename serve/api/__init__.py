"""The wire: what clients send and get. It does not know how requests are served."""
