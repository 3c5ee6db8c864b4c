import os
from urllib.request import Request, urlopen

token = {"Authorization": "Bearer " + os.environ["ATTUNE_REWARD_TOKEN"]}
urlopen(Request("http://127.0.0.1:8077/readyz", headers=token), timeout=10)
