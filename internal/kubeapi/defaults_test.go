package kubeapi

import (
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	meshv1alpha1 "istio.io/api/mesh/v1alpha1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

func TestDefaultsAreMeshConfig(t *testing.T) {
	mesh := &meshv1alpha1.MeshConfig{}
	for text, message := range map[string]proto.Message{defaultMesh: mesh, defaultMeshNetworks: &meshv1alpha1.MeshNetworks{}} {
		json, err := yaml.YAMLToJSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := protojson.Unmarshal(json, message); err != nil {
			t.Errorf("%T: %v", message, err)
		}
	}
	if mesh.GetRootNamespace() != RootNamespace {
		t.Errorf("root namespace of the mesh is %q, its configuration is in %q", mesh.GetRootNamespace(), RootNamespace)
	}
}

func testDefaults(t *testing.T, c *Child) {
	if err := EnsureDefaults(t.Context(), c.Config()); err != nil {
		t.Fatal(err)
	}
	maps := clientOf(t, c.Config()).CoreV1().ConfigMaps(RootNamespace)
	made, err := maps.Get(t.Context(), MeshConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if made.Data[MeshKey] != defaultMesh || made.Data[MeshNetworksKey] != defaultMeshNetworks {
		t.Errorf("made with %q", made.Data)
	}
	made.Data[MeshKey] = "trustDomain: example.org\n"
	if _, err := maps.Update(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := EnsureDefaults(t.Context(), c.Config()); err != nil {
		t.Fatal(err)
	}
	kept, err := maps.Get(t.Context(), MeshConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if kept.Data[MeshKey] != made.Data[MeshKey] {
		t.Errorf("the user's configuration became %q", kept.Data[MeshKey])
	}
}
