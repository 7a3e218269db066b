"""SDTM: merge whole windows while the structure forms, then single tokens while details do, less and less of them.

Early steps fold the most similar windows into one of their tokens, in attention and feed-forward; late steps leave attention
alone and fold the best matching tokens in the feed-forward. A counter of calls since a token was last computed for itself raises
its chance to be. `sdtm_cache` is the authors' demo: every few steps are dense, and what folded tokens get is blended with what
the branch gave them there.

Source: Fang et al. 2025, CVPR, sections 3.2 and 3.3; the released code where it differs from the paper, from a reading of it.
Differs: keep_ratio can be met to the token (`multiple: 1`; the last window is then folded in part). `delta` shrinks where the
swing would leave the possible range, so that keep_ratio 1 is the dense model. The random member of a window is the same in both
guided halves. SD3.5's second attention shares the plan of the first, where the released code cannot run it. The cache holds
branch outputs before the gate, not after it. The paper's re-weighting of prompts and its score from attention maps are not in
the released code and not here.
"""

from methods.sdtm.cache import SDTMCache as SDTMCache
from methods.sdtm.stages import SDTM as SDTM
