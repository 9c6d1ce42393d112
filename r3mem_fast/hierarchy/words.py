"""English function words, which say nothing about what a text is about."""

STOP_WORDS = frozenset(
    """
    a about above after ah again against all almost also although always am among an and another any are as at away aye back
    be became because become been before being below between both but by came can cannot come could did do does doing
    done down during each either else even ever every few first for forth from further get give go got had has have having he
    her here hers herself him himself his how however i if in indeed into is it its itself just know last least less
    let like made make many may me might mine more most mr mrs ms much must my myself near never no nor not nothing now
    of off often oh o on once one only or other others ought our ours ourselves out over own perhaps quite rather said
    same say see shall she should since so some something still such than that the their theirs them themselves then
    there therefore these they thing this those though through thus tis twas till to together too two under until up upon us
    very was we well went were what when where whether which while who whom whose why will with within without would
    yes yet you your yours yourself
    """.split()
)
