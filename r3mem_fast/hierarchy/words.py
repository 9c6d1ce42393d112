"""Word lists: English function words, which do not tell what a text is about, and names."""

import re


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


STOP_WORDS = frozenset(
    _words("""
    a about above after again against ah all almost also although always am among an and another any are as at away
    aye back be became because become been before being below between both but by came can cannot come could did do
    does doing done down during each either else even ever every few first for forth from further get give go got
    had has have having he her here hers herself him himself his how however i if in indeed into is it its itself
    just know last least less let like made make many may me might mine more most mr mrs ms much must my myself
    near never no nor not nothing now o of off often oh on once one only or other others ought our ours ourselves
    out over own perhaps quite rather said same say see shall she should since so some something still such than
    that the their theirs them themselves then there therefore these they thing this those though through thus till
    tis to together too twas two under until up upon us very was we well went were what when where whether which
    while who whom whose why will with within without would yes yet you your yours yourself
    """)
)

# Names of people and places from everywhere, for decoys: queries that nothing is remembered for.
NAMES = tuple(
    _words("""
    Abernathy Adelaide Amara Anatole Antwerp Aurora Bartholomew Beatrix Bergen Bogota Calcutta Cassandra Chandra
    Cheng Cordoba Cornelius Dagmar Delphine Desmond Dmitri Edinburgh Eleonora Esposito Fatima Ferdinand Fiona
    Florence Gallagher Geneva Gretchen Guadalupe Hamburg Hannibal Hassan Helsinki Horatio Ibrahim Ingrid Isadora
    Ivanov Jakarta Jerome Josephine Kamal Katarina Kingston Kowalski Lagos Leopold Lisbon Lorenzo Lucinda
    Madagascar Magnus Manchester Marguerite Mendoza Mikhail Mumbai Nakamura Naples Nathaniel Nigel Octavia Okafor
    Orlando Oslo Pamela Patagonia Percival Philippa Prague Quentin Ramona Reginald Rosalind Rotterdam Salazar
    Santiago Schneider Seville Siegfried Silvia Sofia Tasmania Theodora Thornton Tobias Toledo Ulysses Ursula
    Valencia Veronica Vienna Vincenzo Warsaw Wilhelmina Winston Yasmin Yokohama Zanzibar Zelda
    """)
)
