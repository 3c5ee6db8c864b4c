{{/* The command that trains. Values of the chart come first, so that the user's overrides win. */}}
{{- define "attune.entrypoint" -}}
{{- $run := .Values.run.name | default .Release.Name -}}
{{- if and (eq .Values.kind "RayJob") (ne .Values.run.resume "auto") (gt (int .Values.job.backoffLimit) 0) -}}
{{- fail (printf "run.resume is %q: every retry would begin there again and set aside what came after; set job.backoffLimit to 0" .Values.run.resume) -}}
{{- end -}}
{{- $words := list "python -m cluster train" (include "attune.recipePath" .Values.recipe) "--run-dir" (printf "/data/runs/%s" $run) "--resume" .Values.run.resume -}}
{{- $words = append $words (printf "stream.url=%s" (include "attune.redisUrl" .)) -}}
{{- $words = append $words "stream.password_env=ATTUNE_REDIS_PASSWORD" -}}
{{- if .Values.redis.caSecret.name }}{{ $words = append $words (printf "stream.ca_file=/etc/attune-redis/%s" .Values.redis.caSecret.key) }}{{ end -}}
{{- $words = append $words "cluster.weights_dir=/data/weights" -}}
{{- $words = append $words (printf "cluster.stop_s=%d" (int .Values.stop.graceSeconds)) -}}
{{- if include "attune.usesReward" . }}{{ $words = append $words (printf "reward.worker.url=%s" (include "attune.rewardUrl" .)) }}{{ end -}}
{{- concat $words .Values.overrides | join " " -}}
{{- end }}

{{/* A pod template of a Ray cluster: dict root, component, group, name, ports (name: number), and
     training: whether it is the training's, which has the volume, Redis and an orderly stop. */}}
{{- define "attune.rayPod" -}}
{{- $values := .root.Values -}}
{{- $grace := int $values.stop.graceSeconds -}}
{{- $isHead := hasSuffix "head" .component -}}
metadata:
  {{- $keep := dict "cluster-autoscaler.kubernetes.io/safe-to-evict" "false" }}
  {{- include "attune.podMetadata" (dict "root" .root "component" .component "annotations" (ternary $keep (dict) $isHead)) | nindent 2 }}
spec:
  {{- include "attune.podCommon" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ ternary (add $grace 60) (add $values.rewardServer.drainSeconds 30) .training }}
  containers:
    - name: {{ .name }}
      image: {{ include "attune.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "attune.containerSecurity" . | nindent 8 }}
      resources:
        {{- include "attune.resources" . | nindent 8 }}
      ports:
        {{- range $name, $number := .ports }}
        - {name: {{ $name }}, containerPort: {{ $number }}}
        {{- end }}
      env:
        {{- if .training }}
        # Ray waits so long for a job that it was told to stop; its default of 3 s allows no last commit.
        - {name: RAY_JOB_STOP_WAIT_TIME_S, value: {{ add $grace 30 | quote }}}
        {{- include "attune.secretEnv" (dict "name" "ATTUNE_REDIS_PASSWORD" "secret" $values.redis.secret) | nindent 8 }}
        {{- else }}
        # /data is the training's to write.
        - {name: HF_HOME, value: /tmp/huggingface}
        {{- end }}
        {{- if or (not .training) (include "attune.usesReward" .root) }}
        {{- include "attune.secretEnv" (dict "name" "ATTUNE_REWARD_TOKEN" "secret" $values.rewardServer.secret) | nindent 8 }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if .training }}
      lifecycle:
        preStop:
          exec:
            # The head stops the job and waits for its last commit; the others stay until then.
            command: [python, -m, cluster.drain, --seconds, {{ add $grace 40 | quote }}{{ if not $isHead }}, --wait{{ end }}]
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if .training }}
        - {name: data, mountPath: /data}
        {{- if $values.redis.caSecret.name }}
        - {name: redis-ca, mountPath: /etc/attune-redis, readOnly: true}
        {{- end }}
        {{- if and $isHead (include "attune.recipeVolume" (dict "recipe" $values.recipe "name" "")) }}
        - {name: recipe, mountPath: /etc/attune, readOnly: true}
        {{- end }}
        {{- else }}
        - {name: data, mountPath: /data, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ .group.tmp }}}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ .group.sharedMemory }}}
    - name: data
      persistentVolumeClaim: {claimName: {{ $values.storage.existingClaim | default (printf "%s-data" (include "attune.fullname" .root)) }}}
    {{- if .training }}
    {{- if $values.redis.caSecret.name }}
    - name: redis-ca
      secret: {secretName: {{ $values.redis.caSecret.name }}}
    {{- end }}
    {{- if $isHead }}
    {{- include "attune.recipeVolume" (dict "recipe" $values.recipe "name" (printf "%s-recipe" (include "attune.fullname" .root))) | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end }}

{{/* A RayClusterSpec: dict root, head, workers (groups), training, prefix (of the components), headPorts. */}}
{{- define "attune.rayCluster" -}}
{{- $context := . -}}
{{- $store := mul .root.Values.ray.objectStoreMiB 1048576 | toString -}}
rayVersion: {{ .root.Values.ray.version | quote }}
enableInTreeAutoscaling: false
authOptions:
  mode: token
  {{- with .root.Values.ray.authSecret }}
  secretName: {{ . }}
  {{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    num-cpus: "0"
    object-store-memory: {{ $store | quote }}
  template:
    {{- include "attune.rayPod" (dict "root" .root "component" (printf "%s-head" .prefix) "group" .head "name" "ray-head" "ports" .headPorts "training" .training) | nindent 4 }}
workerGroupSpecs:
  {{- range .workers }}
  - groupName: {{ .name }}
    replicas: {{ .replicas }}
    minReplicas: {{ .replicas }}
    maxReplicas: {{ .replicas }}
    rayStartParams:
      object-store-memory: {{ $store | quote }}
    template:
      {{- include "attune.rayPod" (dict "root" $context.root "component" (printf "%s-worker" $context.prefix) "group" . "name" "ray-worker" "ports" $context.workerPorts "training" $context.training) | nindent 6 }}
  {{- end }}
{{- end }}
