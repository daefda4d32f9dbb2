"""Requests in, answers out. Nothing outside of this folder knows aiokafka.

    intake      reader, assignment, consumer    what is read, and of which partitions
    tracker     metadata, group_offsets         what is answered, and how that is committed
    publisher   producer, dead_letters, topics  what is sent
    delivery                                    in which order the two meet

`embedded` is a broker for demo and development.
"""
