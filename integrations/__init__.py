"""KVStrata inside other engines: one file per engine, which imports no other engine."""
