//! The packet programs through BPF test-run: the same table for TC, XDP and generic XDP.

mod answers;
mod budget;
mod clsact;
mod cookies;
mod exhaustion;
mod flows;
mod header;
mod packet;
mod pins;
mod policies;
mod prefixes;
mod rewrites;
mod rig;
mod stack;
mod turnover;
mod unfit;
mod vlans;
