"""The questions that an evaluation asks. A new one is a file here and an entry in the list."""

from pipelines.evaluation.question import Question
from pipelines.evaluation.questions.adversaries import Adversaries
from pipelines.evaluation.questions.calibration import Calibration
from pipelines.evaluation.questions.converter import Converter
from pipelines.evaluation.questions.divergence import Divergence
from pipelines.evaluation.questions.drafts import Drafts
from pipelines.evaluation.questions.frontier import Frontier
from pipelines.evaluation.questions.judge import Judge
from pipelines.evaluation.questions.judges import Judges
from pipelines.evaluation.questions.law import Law
from pipelines.evaluation.questions.likelihood import Likelihood
from pipelines.evaluation.questions.mauve import Mauve
from pipelines.evaluation.questions.memorisation import Memorisation
from pipelines.evaluation.questions.robustness import Robustness
from pipelines.evaluation.questions.states import States
from pipelines.evaluation.questions.texts import Texts
from pipelines.evaluation.questions.traces import Traces

# In the order of the report.
QUESTIONS: tuple[Question, ...] = (
    Frontier(),
    Mauve(),
    Judge(),
    Judges(),
    Texts(),
    Adversaries(),
    Memorisation(),
    Divergence(),
    Likelihood(),
    States(),
    Law(),
    Calibration(),
    Drafts(),
    Converter(),
    Robustness(),
    Traces(),
)
