"""Devices that jobs run on."""
