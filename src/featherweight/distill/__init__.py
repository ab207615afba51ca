"""Learning from a teacher, from peers or from oneself: terms that a Fit adds to the task's loss."""

from featherweight.distill.advice import StudentSize, students
from featherweight.distill.features import Features
from featherweight.distill.logits import Logits
from featherweight.distill.relations import Relations
from featherweight.distill.strategies.alone import Exits, OwnPast, Regression, Smoothing
from featherweight.distill.strategies.generations import BornAgain
from featherweight.distill.strategies.online import Mutual
from featherweight.distill.student import Student, StudentPlan

__all__ = ["BornAgain", "Exits", "Features", "Logits", "Mutual", "OwnPast", "Regression", "Relations", "Smoothing",
           "Student", "StudentPlan", "StudentSize", "students"]
