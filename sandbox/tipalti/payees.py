"""Payees: made, onboarded, looked up. Only an active one with a payment method and a tax form is payable."""

from __future__ import annotations

import msgspec

from sandbox.tipalti import model
from sandbox.tipalti.errors import TipaltiError, invalid, not_found
from sandbox.tipalti.world import World

ID_LENGTH_MAX = 64
ONBOARD_S = 1.0
"""How long a payee's onboarding takes, by the clock."""
UNPAYABLE = "unpayable"
"""A payee with this in its refCode never completes its onboarding."""
NO_TAX_FORM = "notaxform"
"""A payee with this in its refCode completes it without a tax form."""
STATUSES = ("PENDING_ONBOARDING", "ACTIVE", "SUSPENDED", "BLOCKED", "CLOSED")


class NewPayee(msgspec.Struct):
    """The body of `POST /payees`; other members are accepted and ignored."""

    refCode: str
    name: str | None = None
    email: str | None = None
    entityType: str = "INDIVIDUAL"


class Payable(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /_control/payee`: `payee` is an id or refCode; what isn't given stays."""

    payee: str
    payable: bool | None = None
    status: str | None = None
    taxForm: bool | None = None


def register(world: World) -> None:
    """Connect the timers of this module."""
    world.timers.on("onboard", lambda payee: _onboard(world, payee))


def show(row: model.Payee) -> dict[str, object]:
    """A payee in the API's shape."""
    reasons = not_payable(row)
    return {
        "id": row.id,
        "refCode": row.ref_code,
        "name": row.name,
        "contactInformation": {"email": row.email},
        "entityType": row.entity_type,
        "status": row.status,
        "isPayable": not reasons,
        "notPayableReasons": reasons,
        "paymentMethod": "ACH" if row.payable else None,
        "createdDate": row.created,
    }


def not_payable(row: model.Payee) -> list[str]:
    """Why the payee can't be paid now; empty when it can."""
    reasons = [] if row.payable else ["PAYMENT_METHOD_NOT_SET"]
    if not row.tax_form:
        reasons.append("TAX_FORM_MISSING")
    if row.status != "ACTIVE":
        reasons.append("ONBOARDING_NOT_COMPLETED" if row.status == "PENDING_ONBOARDING" else f"PAYEE_{row.status}")
    return reasons


def find(world: World, name: str) -> model.Payee | None:
    """The payee of an id or of a refCode."""
    row = world.payees.get(name)
    if row is not None:
        return row
    found = world.payees.page(1, filters=[("ref_code", name)])
    return world.payees.get(found[0].id) if found else None


def create(world: World, body: bytes) -> dict[str, object]:
    """POST /payees. 409 when the refCode is taken."""
    asked = msgspec.json.decode(body, type=NewPayee)
    if not 1 <= len(asked.refCode) <= ID_LENGTH_MAX:
        raise invalid(f"refCode has from 1 to {ID_LENGTH_MAX} characters.")
    if find(world, asked.refCode) is not None:
        raise TipaltiError(409, "ALREADY_EXISTS", f"There is a payee with refCode {asked.refCode} already.")
    row = model.Payee(
        id=world.payees.new_id(),
        created=world.now_s(),
        ref_code=asked.refCode,
        name=asked.name,
        email=asked.email,
        entity_type=asked.entityType,
        tax_form=NO_TAX_FORM not in asked.refCode,
    )
    world.payees.save(row)
    if UNPAYABLE not in row.ref_code:
        world.timers.add("onboard", row.id, ONBOARD_S)
    return show(row)


def retrieve(world: World, name: str) -> dict[str, object]:
    """GET /payees/{id}, by id or refCode."""
    row = find(world, name)
    if row is None:
        raise not_found(f"payee {name}")
    return show(row)


def _onboard(world: World, payee_id: str) -> None:
    row = world.payees.get(payee_id)
    if row is not None and not row.payable:
        set_payable(world, row, payable=True)


def set_payable(world: World, row: model.Payee, *, payable: bool) -> None:
    """The payee completed its onboarding, or lost what made it payable."""
    row.payable = payable
    if payable and row.status == "PENDING_ONBOARDING":
        row.status = "ACTIVE"
    _changed(world, row)


def _changed(world: World, row: model.Payee) -> None:
    world.payees.save(row)
    world.notify("payee_details_changed", payeeId=row.id, refCode=row.ref_code, isPayable=not not_payable(row))


def control(world: World, body: bytes) -> dict[str, object]:
    """`POST /_control/payee`."""
    asked = msgspec.json.decode(body, type=Payable)
    row = find(world, asked.payee)
    if row is None:
        raise ValueError(f"no payee {asked.payee}")
    if asked.status is not None:
        if asked.status not in STATUSES:
            raise ValueError(f"status is one of {', '.join(STATUSES)}")
        row.status = asked.status
    if asked.taxForm is not None:
        row.tax_form = asked.taxForm
    if asked.payable is not None:
        set_payable(world, row, payable=asked.payable)
    else:
        _changed(world, row)
    return show(row)
