"""Requests in, answers out. Nothing outside of this folder knows aiokafka.

    intake        reader, assignment, consumer           what is read, and of which partitions
    tracker       metadata, group_offsets                what is answered, and how that is committed
    publisher     producer, dead_letters, topics         what is sent
    delivery                                             sent, then committed: at least once
    exactly_once  outbox, transactions,                  sent and committed in one
                  transactional_producer
    control                                              what every worker is told

`embedded` is a broker for demo and development.
"""
