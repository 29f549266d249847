//! Clients, the box and members in namespaces: what smtplb promises, with real mail.

mod differential;
mod hostile;
mod icmp;
mod install;
mod member_down;
mod mtu;
mod passthrough;
mod proxy;
mod proxy_protocol;
mod refusal;
mod sandbox;
mod scene;
mod survival;
mod the_box;
mod the_lab;
mod vlan;
mod volume;
