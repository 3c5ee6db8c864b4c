-- ARGV: the name of this call. From now on the chain of the driver's calls goes on from it, and from no other: an earlier
-- driver that is still there is refused. The gate is forgotten: no lease is given until it is opened.
redis.call('SET', P .. 'mark', ARGV[1])
return redis.call('DEL', P .. 'gate')
