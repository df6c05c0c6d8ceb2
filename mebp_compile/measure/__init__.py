"""Meters (live bytes, malloc, RSS), measured costs of ops and of the disk, and the transfer thread. Imports nothing
by itself.
"""
