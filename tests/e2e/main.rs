//! Clients, the box and members in namespaces: what smtplb promises, with real mail.

mod differential;
mod flow_log;
mod grid;
mod hostile;
mod icmp;
mod install;
mod jumbo;
mod member_down;
mod members;
mod mtu;
mod offload;
mod passthrough;
mod policies;
mod prefixes;
mod proxy;
mod proxy_protocol;
mod refusal;
mod reload;
mod sandbox;
mod scene;
mod soak;
mod survival;
mod the_box;
mod the_lab;
mod vlan;
mod volume;
