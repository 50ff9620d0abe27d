"""Moves tokens between ranks. Knows expert ids as destinations; knows no router and no model."""
