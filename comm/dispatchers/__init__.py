"""Implementations of the TokenDispatcher contract, one a file, and the choice between them."""
