"""Python imports this by its name at every start; here, to plant a defect into a real program."""

from tests.torture.planted_faults import plant_from_environment

plant_from_environment()
