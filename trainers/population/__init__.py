"""Training the models of one `ModelBatch` as a population: metrics by name, the best of each, successive halving."""

from trainers.population.best_models import BestModels
from trainers.population.halving import Halving
from trainers.population.history import History
from trainers.population.training import Population

__all__ = ["BestModels", "Halving", "History", "Population"]
