"""Measurements of engines, searches and quality."""
