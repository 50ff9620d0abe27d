"""What to send and what to compute: router, experts, balance, and the layer that joins them."""
