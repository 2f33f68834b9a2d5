"""Runs on a cluster: what a job asks for, and the script that is submitted."""
