"""Supernets: elastic layers, Once-for-All and ProxylessNAS."""
