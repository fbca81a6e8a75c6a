"""Automatic mixed precision: which group of linears gets which scheme."""
