"""The ledger's Lua scripts: `common.lua` goes in front of each. A package so that they are installed with the rest."""
