"""Weights from the learner to every engine at once, by a collective, without a file between them.

One party sends (rank 0 of the learner), all others receive: each worker of each engine. They meet at a store of the
sender's, whose address goes round in an `Offer`; the bytes go in buckets, by the way that the places of all allow
(`ways`). Where all have the same memory, one GPU or one machine without any, they look at a buffer of the sender's.
Otherwise a process group that lives as long as the one transfer carries them: NCCL where every party has a GPU of its
own, gloo between hosts' memories where not.

    sender      offer ............. start(plan)    bucket 0  checksum 0  bucket 1 ...  waits for all .... end
    receiver            join(name) .............. takes it, verifies it, hands it on ... done(name)

Every wait has a deadline of the offer's, but for that of a receiver whose sender stands still and is not dead: the
driver, whose deadline holds for all that the learner does, ends the sender then. A party that dies breaks the transfer
for all: the sender reports who received everything, who refused and why, and who did not answer; a receiver raises
`Broken`, which says what it knows. Then there is another transfer, of the same version or a later one.
"""
