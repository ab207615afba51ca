"""Recipes: steps in order, from Python or TOML, and the job that applies and measures them one by one."""

from featherweight.recipe.apply import compress
from featherweight.recipe.job import Job
from featherweight.recipe.kinds import kinds, register
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.result import Decision, Final, Result

__all__ = ["Decision", "Final", "Job", "Recipe", "Result", "compress", "kinds", "register"]
