"""The set-up behind `deploy/setup_env.py`: one virtual environment, from pinned packages, complete or not there.

Standard library only: it runs before anything is installed.
"""
