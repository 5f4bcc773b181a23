"""Several hosts as one Ray cluster: SSH between them, checks, start and stop"""
