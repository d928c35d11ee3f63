"""The old home of the style of figures, until its last user has moved."""

from experiments.lab.figures import BLACK as BLACK
from experiments.lab.figures import BLUE as BLUE
from experiments.lab.figures import GREEN as GREEN
from experiments.lab.figures import GREY as GREY
from experiments.lab.figures import ORANGE as ORANGE
from experiments.lab.figures import style as style
