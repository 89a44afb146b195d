package bench

import (
	"context"
	"time"

	"isthmus.dev/internal/demo/machine"
)

// settle is how long the mesh is left alone before its memory is read.
const settle = 5 * time.Second

// measureMemory reads what each program holds.
func measureMemory(ctx context.Context, m *mesh, _ Options) ([]Measurement, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(settle):
	}
	var out []Measurement
	for _, one := range []struct {
		on             *machine.Machine
		title          string
		name, argument string
		aim            float64
	}{
		{m.control.Machine, "isthmusd", "isthmusd", "", 80},
		{m.control.Machine, "isthmus-kube", "isthmus-kube", "", 500},
		{m.server.Machine, "isthmus-agent", "isthmus-agent", "run", 30},
		{m.server.Machine, "isthmus-agent, holder of the capture", "isthmus-agent", "capture", 0},
		{m.server.Machine, "Envoy", "envoy", "", 0},
	} {
		p, err := find(one.on, one.name, one.argument)
		if err != nil {
			return nil, err
		}
		got, err := p.memory()
		if err != nil {
			return nil, err
		}
		out = append(out,
			Measurement{Name: one.title + ", resident", Value: got.resident, Unit: "MB", Aim: one.aim},
			Measurement{Name: one.title + ", of it not file-backed", Value: got.private, Unit: "MB"})
	}
	return out, nil
}
