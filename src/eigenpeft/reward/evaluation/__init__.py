"""Evaluation of reward models beside their controls."""
