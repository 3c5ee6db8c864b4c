"""What `helm test` asks: does Redis let us in and keep what it is given, and is the reward server ready?"""

import os
from urllib.request import Request, urlopen

from redis import Redis

ca = os.environ.get("REDIS_CA")
tls = {"ssl_ca_certs": ca} if ca else {}
redis = Redis.from_url(os.environ["REDIS_URL"], password=os.environ["REDIS_PASSWORD"], socket_timeout=10, **tls)
policy = redis.info("memory")["maxmemory_policy"]
assert policy == "noeviction", f"Redis: maxmemory-policy is {policy}, and would lose samples"
print("Redis answers and evicts nothing")

reward = os.environ.get("REWARD_URL")
if reward:
    token = {"Authorization": "Bearer " + os.environ["ATTUNE_REWARD_TOKEN"]}
    urlopen(Request(reward + "/readyz", headers=token), timeout=30)  # noqa: S310 - http, by the chart
    print("the reward server is ready")
