"""What a daemon needs: run loop, metrics and health endpoints, logging, signals."""
