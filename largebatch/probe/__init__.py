"""How far k can grow: gradient drift, noise scale, sharpness and the lag of BatchNorm, measured along a run."""
