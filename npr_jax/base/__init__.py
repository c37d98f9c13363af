"""The ground: configs, devices, processes, files. Imports no other room."""
