"""What the package is held against: derivations, the specification of the wire, and clients that lie."""
