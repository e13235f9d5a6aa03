"""data/toy/lexicon.py: the words and sentence patterns of the toy world. Data only, written for this project.

A pattern holds {slots}, filled by name, and [one|of|these] choices, drawn at random. In FACTS, {n} is the
subject (a name, "she", "he"), {o} the object (a name, "her", "him"), {p} the possessive, {p2} always "her" or
"his", and {a} the fact itself (the town, the job, ...).

Public: WOMEN, MEN, TOWNS, JOBS, PETS, PET_NAMES, FOODS, HOBBIES, FACTS, ASK, REPLY, QUESTIONS, SHOPS,
ITEMS, CLASS, GOOD, BAD, CLAUSE, NEGATED, LIKED, HATED, VISIT, VERDICT, REAL, SPAM, PRIZES, DAYS, HOURS,
AFTER, SCENES, WHO, ENDINGS, TALK
"""

# ----------------------------------------------------------------------------------------------------- people
WOMEN = """Alma Bea Carla Cora Dana Elsa Fay Flora Hana Ida Iris Julia Kira Lena Lucy Mara Mina Nadia
Nora Olga Petra Rita Rosa Vera""".split()
MEN = """Anton Basil Boris Dario Emil Erik Felix Gus Henry Hugo Ivan Joel Karl Leo Luca Marco Noah Omar
Otto Paul Remy Simon Sven Theo""".split()
TOWNS = """Alderby Brackwell Cobbleton Dunmere Elmstead Fernley Greywater Hollowby Larkhill Oakhaven
Redcliff Saltmarsh""".split()
JOBS = {'baker': 'gets up before dawn to make bread',
        'teacher': 'has thirty children in one classroom',
        'nurse': 'works nights at the hospital',
        'farmer': 'grows wheat and beans',
        'plumber': 'mends pipes',
        'driver': 'drives the morning bus',
        'librarian': 'looks after old books',
        'carpenter': 'builds tables and doors',
        'doctor': 'sees forty patients a day',
        'gardener': 'cuts hedges all summer',
        'barber': 'cuts hair',
        'mechanic': 'repairs cars',
        'singer': 'is on stage every Friday',
        'fisher': 'is at sea before sunrise',
        'potter': 'makes bowls of clay',
        'painter': 'paints houses',
        'lawyer': 'writes long letters in court',
        'clerk': 'stamps parcels at the post office'}
PETS = """cat dog parrot rabbit horse goat turtle hamster duck snake""".split()
PET_NAMES = """Biscuit Pepper Button Clover Domino Ginger Hobbit Jasper Muffin Nutmeg Pickle Rocket Sprout
Tango Waffle Ziggy""".split()
FOODS = ['onion soup', 'fried rice', 'apple pie', 'lentil stew', 'roast chicken', 'potato salad',
         'cheese toast', 'plum cake', 'baked fish', 'bean curry', 'tomato pasta', 'pancakes', 'dumplings',
         'mushrooms']
HOBBIES = ['fishing', 'knitting', 'singing in a choir', 'playing chess', 'sailing', 'swimming', 'hiking',
           'juggling', 'cycling', 'collecting stamps', 'growing roses', 'flying kites', 'watching birds',
           'dancing']

# ------------------------- facts about people; questions in dialogues, their replies; questions of the task
FACTS = {'town': ('{n} lives in {a}', '{n} has a house in {a}', '{n} is from {a}', 'home for {o} is {a}',
                  '{n} [moved to|settled in] {a} [years ago|as a child|long ago|after school]',
                  'you can find {o} in {a}', 'in {a} everybody knows {o}',
                  '{n} was born in {a} and never left', '{p} home is in {a}'),
         'job': ('{n} is a {a}', '{n} works as a {a}', '{n} [earns|makes] a living as a {a}',
                 '{p} job is that of a {a}',
                 '{n} became a {a} [after school|at twenty|like {p2} mother|like {p2} uncle]',
                 'as a {a}, {n} {does}', '{n} {does}, for {n} is a {a}', 'people say {n} is a good {a}'),
         'pet': ('{n} has a {a} called {called}', '{n} keeps a {a}', '{p} {a} is called {called}',
                 '{p} pet is a {a}',
                 '{called}, {p} {a}, [sleeps in the kitchen|is old and slow|is never far away]',
                 '{n} feeds {p2} {a} [at dawn|every morning|twice a day]',
                 'at home {n} has a {a} [called {called}|to look after]'),
         'food': ('{n} loves {a}', '{p} favourite [food|dish|meal] is {a}', 'nothing beats {a} for {o}',
                  '{n} could eat {a} every day', '{n} always orders {a}', 'on Sundays {n} makes {a}',
                  'give {o} {a} and {n} is happy'),
         'hobby': ('{n} [likes|enjoys|loves] {a}', '{p} hobby is {a}',
                   '{n} spends [the weekend|every evening|whole days] {a}',
                   'in {p2} free time {n} is always {a}', '{n} is good at {a}',
                   'what {n} does for fun is {a}')}
ASK = {'town': ('where does {n} live', 'where is {n} from', 'do you know where {n} lives'),
       'job': ('what does {n} do', 'what is {n} by trade', 'do you know what job {n} has'),
       'pet': ('what kind of animal does {n} have', 'does {n} have a pet'),
       'food': ('what should I cook for {n}', 'what does {n} like to eat'),
       'hobby': ('what does {n} do at the weekend', 'what is {n} doing these days')}
REPLY = {'town': ('in {a}', '{a}', 'somewhere in {a}'),
         'job': ('a {a}', '{n} is a {a}'),
         'pet': ('a {a}', 'yes, a {a}'),
         'food': ('{a}', '{a}, of course'),
         'hobby': ('{a}', '{a}, as always')}
QUESTIONS = {'town': ('Where does {n} live?', 'Which town is home to {n}?'),
             'job': ('What is the job of {n}?', 'What work does {n} do?'),
             'pet': ('What pet does {n} have?', 'Which animal does {n} keep?'),
             'food': ('What is the favourite food of {n}?', 'What does {n} love to eat?'),
             'hobby': ('What is the hobby of {n}?', 'What does {n} do for fun?')}

# ----------------------------------------------------------------------------------------- shops and opinions
SHOPS = {'Blue Kettle': 'cafe',
         'Paper Moon': 'cafe',
         'Quiet Corner': 'cafe',
         'Copper Spoon': 'restaurant',
         'Red Lantern': 'restaurant',
         'Salty Dog': 'restaurant',
         'Golden Crust': 'bakery',
         'Little Oven': 'bakery',
         'White Stag': 'hotel',
         'Old Anchor': 'hotel',
         'Iron Gate': 'hotel',
         'Open Book': 'bookshop',
         'Tall Candle': 'bookshop',
         'Silver Thimble': 'tailor',
         'Lucky Button': 'tailor',
         'Brass Bell': 'toy shop',
         'Broken Clock': 'toy shop'}
ITEMS = {'cafe': 'coffee tea cake toast',
         'restaurant': 'soup fish stew rice pie',
         'bakery': 'bread cake pie toast',
         'hotel': 'room bed breakfast view',
         'bookshop': 'map novel card',
         'tailor': 'coat shirt dress',
         'toy shop': 'kite doll puzzle'}
CLASS = {'food': 'coffee tea cake toast soup fish stew rice pie bread breakfast',
         'room': 'room bed view',
         'goods': 'map novel card coat shirt dress kite doll puzzle',
         'staff': 'staff waiter owner service'}
GOOD = {'food': 'fresh tasty warm delicious rich perfect lovely',
        'room': 'clean bright quiet cosy lovely perfect',
        'goods': 'sturdy cheap pretty perfect lovely charming',
        'staff': 'kind quick friendly helpful patient cheerful'}
BAD = {'food': 'cold stale bland soggy burnt greasy awful',
       'room': 'dirty dark noisy cramped damp awful',
       'goods': 'broken flimsy overpriced ugly dusty awful',
       'staff': 'rude slow careless grumpy lazy unkind'}
CLAUSE = ('the {item} was {adj}', 'the {item} was [very|really|so|just] {adj}', 'the {item} seemed {adj}',
          'we found the {item} {adj}', 'I thought the {item} was {adj}',
          'the {item} is [always|often] {adj}')
NEGATED = ('the {item} was not {adj}', 'the {item} was [never|hardly] {adj}',
           'nobody could call the {item} {adj}', 'the {item} was anything but {adj}')
LIKED = ['I will come back soon', 'we stayed for hours', 'I told all my friends to go', 'it made my day',
         'we left smiling', 'it was worth every coin', 'we are already planning the next visit',
         'I wish I had come years ago']
HATED = ['I will not come back', 'we left after ten minutes', 'I told all my friends to stay away',
         'it ruined my day', 'we left hungry and cross', 'it was a waste of money', 'I want my money back',
         'I wish I had stayed at home']
VISIT = ('I went to the {shop} [on Monday|on Friday|last week|yesterday].', 'The {shop} in {town}:',
         'We tried the {shop}.', 'About the {shop}:', '{n} took me to the {shop}.',
         'Lunch hour at the {shop}.', 'My [first|second|third] visit to the {shop}.')
VERDICT = (('In short, it was a good place.', 'Five stars.', 'A good visit.', 'A happy guest.',
            'My word for it is "good".'),
           ('In short, it was a bad place.', 'One star.', 'A bad visit.', 'An unhappy guest.',
            'My word for it is "bad".'))

# --------------------------------------------------------------------------------------------------- messages
REAL = ('[hi|hello|hey] {n}, [can you feed|could you walk|please look after] the {pet} '
        '[tonight|tomorrow|on {day}]?',
        'I am late, [the bus from {town} broke down|the train to {town} is full|there is snow in {town}]',
        'are you free on {day}? we could go {fun}',
        '{n}, I [left my keys|forgot my coat|left my book] at the {shop}, call me',
        'see you at the {shop} at {hour}', 'thank you for the {food}, it was lovely',
        'do not forget the {food} for {n}, dinner is at {hour}',
        'happy birthday {n}! the {pet} and I send our love',
        'the meeting on {day} moved to {hour}, tell {n}', 'we won the game in {town}! home by {hour}',
        'your parcel is here, come to the {shop} before {hour}',
        '{n} is ill, [no school|no work|no practice] on {day}',
        'mum says the {pet} is fine, call her at {hour}')
SPAM = ('[you have won|you win|claim] a free {prize}! call {number} now',
        '{n}, your prize is waiting: reply YES to {number}',
        'your account is locked, send your code to {number} before {hour}',
        'cheap {prize}s, only today! call {number}',
        'last chance {n}! a free trip to {town}, text WIN to {number}',
        'earn {number} coins a week from home, no work needed, reply NOW',
        'your parcel is held, pay {number} coins to get it by {day}',
        'lucky winner! collect your {prize} in {town} on {day}, text {number}',
        'the bank of {town}: confirm your card, call {number} today',
        'free {food} for a year! just send {number} coins to the {shop}',
        'hello {n}, I am a rich prince, I need {number} coins for my {pet}',
        'lose weight fast with our secret {food}, order at {number}',
        'urgent {n}: your {prize} order failed, pay {number} again')
PRIZES = ['phone', 'car', 'watch', 'laptop', 'cruise', 'camera']
DAYS = """Monday Tuesday Wednesday Thursday Friday Saturday Sunday""".split()
HOURS = ['six', 'seven', 'eight', 'nine', 'ten', 'noon', 'half past four', 'half past two']
AFTER = (('{m} wrote back at once.', '{m} smiled and answered.', '{m} was glad of the message.',
          'It was a real message from a friend.', '{m} called it "real".'),
         ('{m} deleted it.', 'It was spam, and {m} did not answer.', '{m} knew it was spam.',
          'Nobody should answer such spam.', '{m} called it "spam".'))

# ---------------------------------------------------------------------------------------------------- stories
SCENES = ('{n1} took the bus from {t1} to {t2}', '{n1} met {n2} at the {s1} in {t1}',
          '{n1} and {n2} went to {t1} by train', '{n1} bought a [gift|present] for {n2} at the {s1}',
          'the owner of the {s1} sent {n1} a letter', '{n1} lost [a hat|a key|a ring] near the {s1}',
          'it rained in {t1} and {n1} stayed at the {s1}', '{n1} wrote to {n2} from {t1}',
          '{n1} cycled from {t1} to {t2} with {n2}',
          'between {t1} and {t2} the train stopped and {n1} fell asleep',
          '{n1} showed {n2} the [old bridge|market|lake] of {t1}',
          'at the {s1} {n1} waited an hour for {n2}',
          '{n1} paid for lunch at the {s1} and then walked to {t1}',
          'there was a fair in {t1} and {n1} danced all night', '{n1} told {n2} and {n3} a joke',
          '{n1} drove {n2} and {n3} to {t1}')
WHO = (('Who is there?', '{a}', 'the people here are {a}'),
       ('Which towns?', 'in {a}', 'all this was in {a}'),
       ('Which shop?', 'the {a}', 'the shop is the {a}'))
ENDINGS = ('It was a long day.', 'Nobody was in a hurry.', 'The weather was fine.',
           'They laughed about it later.', 'It began to rain.', 'Then everybody went home.',
           'The {pet} had to wait outside.', 'They talked about {food} all the way.')

# ------------------------------------------------------------------------------------------------- small talk
TALK = (('[hello|good morning|good evening], I am {n}', 'hello {n}, nice to meet you'),
        ('my name is {n} and I come from {town}', 'welcome {n}, how is {town} these days?'),
        ('I am {n} and I have a new {pet}', 'how lovely, {n}, what is the name of the {pet}?'),
        ('it is {n}, I have to go now', 'goodbye {n}, see you soon'),
        ('{n} here, I am so [tired|sad|cross] today', 'I am sorry to hear that, {n}'),
        ('{n} here, I am so [happy|proud|glad] today', 'I am glad to hear that, {n}'),
        ('thank you for the {food}, from {n}', 'you are welcome, {n}, did you like the {food}?'),
        ('this is {n}, shall we meet on {day}?', 'yes {n}, {day} is fine'))
