"""Devices: meshes, over slices too, sharding rules, places of arrays, work one piece ahead, chips.

Jobs: how processes join one, speak to each other, wait and end; who holds a workdir.
Imports no other room.
"""
