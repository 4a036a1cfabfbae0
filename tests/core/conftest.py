import torch
from hypothesis import settings

torch.set_num_threads(1)  # a busy machine slows two threads far more than one
settings.register_profile("steady", deadline=None)  # the first call into torch may take a second
settings.load_profile("steady")
