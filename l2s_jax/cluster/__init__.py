"""Devices: meshes and sharding rules, joining a job of several processes, rates of chips.

Imports no other room.
"""
