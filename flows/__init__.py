"""The flows, and the only code that knows Prefect."""

from panda_ad.system.surroundings import prepare

prepare()  # before Prefect is imported, which looks for the user's home
