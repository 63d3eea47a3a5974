"""Names of people and things for tasks in text."""

FIRST = (
    "Ada Alma Amos Anna Arlo Bella Bruno Carl Clara Dora Edgar Edith Ella Emil Emma Eric "
    "Esther Ezra Felix Flora Frank Fred Greta Hanna Harold Hazel Henry Hugo Ida Iris Isaac "
    "Ivan Jacob James Jane Jonas Joseph Judith Julia Karl Kate Laura Leo Lewis Lily Louis "
    "Lucy Mabel Marie Martha Max Mina Nina Nora Oliver Olga Oscar Otto Paul Peter Ralph Rita "
    "Robert Rosa Ruth Samuel Sarah Simon Sofia Stella Theo Thomas Ursula Vera Victor Walter "
    "Wanda William Xenia Zoe"
).split()
LAST = (
    "Adams Allen Baker Barnes Bell Bennett Brooks Brown Burns Butler Carter Clark Cole "
    "Collins Cooper Cox Davis Dixon Dunn Ellis Evans Fisher Ford Foster Fox Gibson Gordon "
    "Graham Grant Gray Green Hall Harper Harris Hayes Hill Hughes Hunt Jones Kelly Kennedy "
    "King Knight Lane Lee Lloyd Marsh Mason Miller Moore Morgan Murphy Nelson Owen Palmer "
    "Parker Perry Porter Powell Price Reed Rice Rogers Rose Ross Russell Scott Shaw Smith "
    "Stone Taylor Turner Wade Walker Ward Watson Webb West White Wood Wright Young"
).split()
NOUNS = (
    "locker garden window cellar engine harbor library market mirror office piano shelf "
    "station studio table theater tower tunnel vault wagon"
).split()
