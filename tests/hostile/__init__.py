"""Malformed and hostile requests, from a seed; how they are sent; and what a server must be like after them."""

from hostile.attack import Answer, attack
from hostile.requests import Hostile, hostile_requests
from hostile.watch import Footprint, footprint, wait_until_idle

__all__ = ["Answer", "Footprint", "Hostile", "attack", "footprint", "hostile_requests", "wait_until_idle"]
